"""The student of the distillation stage (section III-E): DeepLab V2 with the inherited head."""
