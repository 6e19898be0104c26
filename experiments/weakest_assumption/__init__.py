"""Is what the gate removes harmful?"""
