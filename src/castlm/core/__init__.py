"""The method, on torch alone: masks, AdamS, weight scaling, the distillation loss and the decay budget."""
