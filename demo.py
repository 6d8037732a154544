"""UPLiFT in the browser: ``python demo.py``."""

from demo_app.start import main

if __name__ == "__main__":
    main()
