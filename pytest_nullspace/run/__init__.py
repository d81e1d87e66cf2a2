"""What a run measured: plain data, the file that it is saved in, and how sure it is. No torch, no pytest."""
