"""Does SAPO do better on several tasks at once, in fixed shares of every batch?"""
