from star_attention.cli import main

main()
