"""Does a run that is killed again and again end where one that is left alone ends?"""
