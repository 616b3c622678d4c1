"""Assembly of packs on the device; by default, packs are assembled in DataLoader workers."""
