"""What a layout will need and how fast it will be, before a GPU is rented: pure functions over a
config. No process group, no tensor."""
