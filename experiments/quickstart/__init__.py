"""Do SAPO, GRPO and GSPO differ on the quickstart?"""
