"""Does 5% of τ_neg decide whether SAPO is stable?"""
