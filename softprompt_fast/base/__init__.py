"""What every other package may use: files, figures, versions, errors."""
