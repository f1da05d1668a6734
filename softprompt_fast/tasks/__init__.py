"""What a prompt is for, and the data it is tuned on."""
