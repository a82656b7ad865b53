"""What every stage uses: resumable loop, EMA, Muon, encoded data, text encoder, checkpoint writer."""
