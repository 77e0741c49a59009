"""The attacks, one file each. See `condlr.attacks.base.Attack`."""
