"""Are ratios near 1, and spread little within a sequence, as the paper assumes?"""
