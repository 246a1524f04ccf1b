"""A synonym table of the size and the oddities of CHAIR's own: 80 lines, one for each COCO
category.
"""

LINES = """\
person, girl, boy, man, woman, kid, child, chef, baker, people, adult, rider, baby, worker, \
passenger, policeman, officer, lady, cowboy, bride, groom, guy, gentleman, pitcher, player, \
skier, snowboarder, thief, grandchild
bicycle, bike, unicycle, trike
car, automobile, van, minivan, sedan, suv, cab, jeep, coupe, taxi, limo
motorcycle, scooter, motor bike, motor cycle, motorbike, moped
airplane, jetliner, plane, air plane, aircraft, jet, biplane, seaplane
bus, minibus, trolley
train, locomotive, tramway, caboose
truck, pickup, lorry, firetruck
boat, ship, sailboat, dinghy, speedboat, canoe, yacht, kayak, houseboat, vessel, ferry, barge
traffic light, street light, traffic signal, stop light, streetlight, stoplight
fire hydrant, hydrant
stop sign
parking meter
bench, pew
bird, ostrich, owl, seagull, goose, duck, finch, pigeon, swan, flamingo, crow, turkey, peacock, \
cockatoo, osprey
cat, kitten, feline, tabby
dog, puppy, beagle, pup, canine, collie, pug, poodle, doggie, husky, bulldog, corgi, retriever, \
doggy
horse, colt, pony, stallion, mare, foal
sheep, lamb, ram, goat, ewe
cow, cattle, oxen, ox, calf, heifer, buffalo, bull, bison
elephant
bear, panda
zebra
giraffe
backpack, knapsack
umbrella
handbag, wallet, purse, briefcase
tie, bow, bow tie
suitcase, suit case, luggage
frisbee
skis, ski
snowboard
sports ball, ball
kite
baseball bat
baseball glove
skateboard
surfboard, longboard, wakeboard
tennis racket, racket
bottle
wine glass
cup
fork
knife, pocketknife, knive
spoon
bowl, container
banana
apple
sandwich, burger, sub, cheeseburger, hamburger
orange
broccoli
carrot
hot dog
pizza
donut, doughnut, bagel
cake, cheesecake, cupcake, pancake
chair, seat, stool
couch, sofa, recliner, futon, loveseat
potted plant, houseplant
bed
dining table, table, desk
toilet, urinal, commode, lavatory, potty
tv, monitor, televison, television
laptop, computer, notebook, netbook, laptop computer
mouse
remote
keyboard
cell phone, mobile phone, phone, cellphone, telephone, smartphone, iPhone
microwave
oven, stovetop, stove, stove top oven
toaster
sink
refrigerator, fridge, freezer
book
clock
vase
scissors
teddy bear, teddybear
hair drier, hairdryer
toothbrush""".splitlines()

# The last word of a name -> its plural, where no rule makes it.
PLURALS = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "people": "people",
    "policeman": "policemen",
    "gentleman": "gentlemen",
    "thief": "thieves",
    "grandchild": "grandchildren",
    "goose": "geese",
    "sheep": "sheep",
    "cattle": "cattle",
    "oxen": "oxen",
    "ox": "oxen",
    "calf": "calves",
    "bison": "bison",
    "aircraft": "aircraft",
    "luggage": "luggage",
    "skis": "skis",
    "knife": "knives",
    "pocketknife": "pocketknives",
    "mouse": "mice",
    "scissors": "scissors",
    "buffalo": "buffaloes",
    "broccoli": "broccoli",
}

# What is something else together than apart -> the objects that it names.
DOUBLE = {
    "motor bike": ["motorcycle"],
    "motor cycle": ["motorcycle"],
    "air plane": ["airplane"],
    "traffic light": ["traffic light"],
    "street light": ["traffic light"],
    "traffic signal": ["traffic light"],
    "stop light": ["traffic light"],
    "fire hydrant": ["fire hydrant"],
    "stop sign": ["stop sign"],
    "parking meter": ["parking meter"],
    "suit case": ["suitcase"],
    "sports ball": ["sports ball"],
    "baseball bat": ["baseball bat"],
    "baseball glove": ["baseball glove"],
    "tennis racket": ["tennis racket"],
    "wine glass": ["wine glass"],
    "hot dog": ["hot dog"],
    "cell phone": ["cell phone"],
    "mobile phone": ["cell phone"],
    "teddy bear": ["teddy bear"],
    "hair drier": ["hair drier"],
    "potted plant": ["potted plant"],
    "bow tie": ["tie"],
    "laptop computer": ["laptop"],
    "home plate": [],
    "train track": [],
    "toilet seat": ["toilet"],
    "passenger jet": ["airplane"],
    "passenger train": ["train"],
    "baby bird": ["bird"],
    "adult cat": ["cat"],
    "baby animal": [],
    "adult cub": [],
    "baby zebra": ["zebra"],
}
