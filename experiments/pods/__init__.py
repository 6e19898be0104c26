"""Do the pod configs fit?"""
