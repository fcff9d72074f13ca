"""What all rooms use and none of them owns: files, seeds, checks, messages."""
