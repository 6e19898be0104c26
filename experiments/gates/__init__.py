"""What do the gates do to a token, and what does the optimizer see of it?"""
