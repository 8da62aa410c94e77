"""python -m nrrn_pipeline.cli"""

from nrrn_pipeline.cli import main

if __name__ == "__main__":  # not in the processes that it starts
    main()
