from star_attention.cli.main import main

main()
