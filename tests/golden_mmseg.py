MMSEG = {}
