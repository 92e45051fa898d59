import sys
from benchmarks.optimizers import optimizer as o
from benchmarks.optimizers.greater import Greater
class Old(Greater):
    name='greater-old'; defaults={"auto":None,"replayed":8,"forecasts":3,"phrases":0,"written":0,"forecast_share":0}
class Gates(Greater):
    name='greater-gates'; defaults={"auto":None,"phrases":0,"written":0}
class New(Greater):
    name='greater-new'; defaults={"auto":None}
for c in (Old,Gates,New): o.OPTIMIZERS[c.name]=f"arms:{c.__name__}"
if __name__=='__main__':
    import arms
    from benchmarks.__main__ import main
    sys.exit(main(sys.argv[1:]))
