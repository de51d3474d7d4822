"""The student of the distillation stage (section III-E): DeepLab V2 with the head that it inherits."""
