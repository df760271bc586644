"""THE LOOP. Token ids in, token ids out."""
