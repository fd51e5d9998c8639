"""One file per way to train. A method is a subclass of `Retraining` and a row in `castlm.methods.table.METHODS`.

Nothing is imported here, so that the names of the methods are known without torch.
"""
