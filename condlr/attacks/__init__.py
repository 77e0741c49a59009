"""The attacks: one file each. See `condlr.attacks.base.Attack` for what one is."""
