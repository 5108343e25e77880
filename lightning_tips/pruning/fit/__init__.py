"""Pruning while a network trains: the callbacks, their guard, distillation, data and reports."""
