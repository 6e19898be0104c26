"""Who survives how many minibatches a rollout, with and without replayed routing?"""
