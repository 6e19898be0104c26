"""Does SAPO outlast GSPO and GRPO-R2, and does it learn as fast?"""
