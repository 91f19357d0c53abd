"""What is served: settings, slots, a batch's requests, and the record of who served them."""
