"""Does a population cost anything on top of its runs?"""
