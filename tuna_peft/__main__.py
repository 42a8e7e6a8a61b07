"""`python -m tuna_peft`."""

from tuna_peft.cli import main

if __name__ == "__main__":
    main()
