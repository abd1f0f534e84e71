from diffdiscover3d.utils.environment import complete_user

complete_user()  # MONAI asks for the name of the user when it is imported
