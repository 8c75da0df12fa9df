"""What layers share: masks, averages, option checks, the replay cache, second derivatives."""
