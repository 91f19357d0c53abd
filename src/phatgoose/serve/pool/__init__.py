"""What is served: settings, slots, the requests of a batch, and who served what."""
