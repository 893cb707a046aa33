"""What a study trains, and how its runs are started and watched."""
