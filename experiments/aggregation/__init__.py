"""Does length normalisation hurt?"""
