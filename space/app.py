from cosa_hf.app import main

main()
