"""`diffusionblocks bench`: memory, speed and depth of DiffusionBlocks beside what an expert would do instead."""
