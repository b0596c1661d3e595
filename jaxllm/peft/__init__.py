"""Parameter-efficient fine-tuning: maps over a tree of parameters that put trained weights beside frozen ones."""
