"""What depends on how transformers works inside. Few other files should change with a transformers upgrade."""
