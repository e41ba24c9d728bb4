"""What tests share: small models, files and processes; no test file imports another."""
