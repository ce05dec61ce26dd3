"""`python -m memkit`, where the console script is not on the path."""
from memkit.cli import main

if __name__ == '__main__': main()
