"""From settings to an engine, the one door to the engines beyond their types: found, built in a process, or PyTorch."""
