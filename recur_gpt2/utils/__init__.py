"""Files, the allocator, devices, measurements: nothing here knows a model or a corpus."""
