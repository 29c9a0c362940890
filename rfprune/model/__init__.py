"""A Transformer as prunable blocks: layout, masks, layer-by-layer execution, compaction, saving."""
