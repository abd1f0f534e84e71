from diffdiscover3d.utils.environment import complete_user

complete_user()  # importing MONAI looks up the name of the user
