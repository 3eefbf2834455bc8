"""Decode attention alone: CrushAttention beside stock PagedAttention, and the memory's reading speed."""
