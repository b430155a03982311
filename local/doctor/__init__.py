"""What `taxiway doctor` finds: this machine, its configuration, its endpoints and the fleet that runs here."""
