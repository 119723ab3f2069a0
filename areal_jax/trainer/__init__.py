"""Learns from batches: packing, the jitted steps, the loop over versions, checkpoints."""
