"""Analysis of data before tuning and of prompts after it."""
