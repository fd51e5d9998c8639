"""The method in torch and the standard library only: patterns, AdamS, weight scaling, distillation, decay budget."""
