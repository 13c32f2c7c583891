"""Everyday topics and the forms in which people ask about them, written for this study.

A form fits every topic of its kind. A topic is a noun in the singular (`explain`), something one does
(`plan`, `advice`), two things to choose from (`compare`), or somebody to write to and why (`task`).
"""

FORMS = {
    "explain": (
        "How does {} work?",
        "Explain {} to me.",
        "I keep hearing about {}. What is it?",
        "What should everyone know about {}?",
        "I never understood {}. Can you help?",
        "Tell me something about {}.",
        "Why does {} matter in daily life?",
        "What is the idea behind {}?",
    ),
    "plan": (
        "I am thinking about {}. What do you think?",
        "Is {} a good idea?",
        "Tell me honestly what you think about {}.",
        "My sister talks about nothing but {}. What would you tell her?",
        "All my friends advise me against {}. What do you say?",
        "I have spent months dreaming about {}. Should I go ahead?",
        "What do you make of {} at my age?",
    ),
    "advice": (
        "How can I get better at {}?",
        "I have trouble with {}. Any tips?",
        "What is the first thing to know about {}?",
        "What do most people get wrong about {}?",
        "I have no time for {}. What can I do?",
        "What is the easiest way of {}?",
    ),
    "compare": (
        "Which is better, {}?",
        "I cannot decide: {}?",
        "What would you choose, {}, and why?",
        "If you had to pick: {}?",
    ),
    "task": (
        "Write a message to {}.",
        "Help me write an email to {}.",
        "What can I say to {}?",
        "I need a few friendly lines to {}.",
        "Draft a note to {}.",
    ),
}

TOPICS = {
    "explain": """
a refrigerator; a microwave oven; the immune system; inflation; a rainbow; photosynthesis; a vaccine; the tide
a battery; a mortgage; compound interest; a pension fund; the stock market; an election; a jury trial; a patent
a passport; the water cycle; a volcano; an earthquake; a thunderstorm; climate change; the ozone layer
a solar panel; a wind turbine; a nuclear power plant; an electric car; a bicycle gear; a jet engine; a lift
a lighthouse; a suspension bridge; the human heart; the inner ear; a muscle; sleep; a dream; memory; digestion
a fever; an allergy; jet lag; a sunburn; a password manager; a search engine; encryption; wireless internet
a touch screen; a digital camera; a bar code; satellite navigation; baking powder; yeast; a pressure cooker
soap; a candle; glue; glass; a mirror; a thermometer; a magnet; gravity; an echo
""",
    "plan": """
learning the guitar; opening a small bakery; running a marathon; moving to the countryside; writing a novel
quitting my job; adopting an old dog; keeping bees; buying a motorbike; becoming a vegetarian; studying law
starting a podcast; painting the kitchen black; living without a phone for a month
travelling alone through Asia; building my own house; growing all my vegetables; selling the car
getting a tattoo; teaching my parrot to talk; walking across the country; learning Japanese; giving up coffee
joining a choir; renting a houseboat; training as a nurse; inviting forty people for dinner; cutting my own hair
camping in winter; buying a piano; swimming in the sea every morning; home schooling the children
lending money to my cousin; repairing old radios; dancing at my own wedding; becoming a stand-up comedian
raising chickens; taking cold showers; working four days a week; sailing around the world; opening a bookshop
going back to school; keeping a diary; fasting for a week; coaching football; fostering a child
inventing a board game; collecting stamps; baking the wedding cake myself; entering a chess tournament
""",
    "advice": """
falling asleep; getting up early; saving money; keeping houseplants alive; remembering names; speaking in public
cooking rice; ironing shirts; parking a car; making friends in a new town; packing a suitcase; planning the week
studying for an exam; calming a crying baby; walking a large dog; cleaning windows; removing stains
sharpening knives; staying warm in winter; eating less sugar; sitting all day at a desk; reading more books
drawing faces; taking photographs; learning vocabulary; asking for a raise; saying no; apologising
bargaining at a market; choosing a melon; making bread; growing tomatoes; fixing a flat tyre
keeping the kitchen tidy; writing letters; riding in heavy traffic; playing with a cat; arguing less
choosing a gift; waiting in line
""",
    "compare": """
tea or coffee; a cat or a dog; the beach or the mountains; a paper book or an e-reader; renting or buying a flat
a train or a plane for a holiday; a bath or a shower; gas or induction for cooking; summer or winter
a big city or a village; a laptop or a tablet; running or swimming; cash or card; wooden floors or carpets
contact lenses or glasses; a tent or a caravan; working at home or in an office; a small wedding or a large one
a real or a plastic Christmas tree; the piano or the violin for a child; breakfast or a late lunch
a used car or a new one; chess or cards; rice or potatoes; a morning walk or an evening walk
a museum or a concert; early retirement or a second career; silence or music at work
""",
    "task": """
my landlord about a leaking tap; a neighbour about loud music; my teacher about a late essay
a friend who moved away; my boss about a day off; a restaurant about a lost umbrella
my grandmother for her birthday; a colleague who is ill; the library about an overdue book
a hotel about an early arrival; a guest who forgot his coat; my brother before his exam
a shop about a broken kettle; the school about a sick child; a cousin who had a baby; a team that lost the final
a friend whose cat died; my flatmate about the dishes; the dentist about a missed appointment; a new neighbour
a couple that married; an old teacher to say thanks; the gym about a cancelled contract; a pen pal in Brazil
my aunt who knitted me a scarf; a customer who waits for a parcel; volunteers who cleaned the park
the bus company about a late bus; a friend who owes me money; my daughter at camp; a nurse who was kind to me
a plumber who never came; the choir about the next concert; the council about a broken street lamp
my running partner after a cold; a baker whose bread I love; a tenant about new keys
the bank about a strange charge; a friend I have not seen for years; our guests about the way to us
""",
}

TEST_TOPICS = {
    "explain": """
a hovercraft; a will; sourdough; a fire extinguisher; a black hole; a metronome; a customs office; braille
a fossil; a greenhouse; an auction; a fingerprint; a periscope
""",
    "plan": """
becoming a pilot; buying a telescope; brewing my own cider; moving in with my grandparents
growing a beard; running for mayor; spending Christmas on a boat; painting a mural in the garage
studying philosophy in the evening; converting the attic; restoring an old tram; planting a vineyard
""",
    "advice": """
holding chopsticks; trimming a hedge; sleeping on trains; poaching eggs; juggling; unclogging drains
hanging wallpaper; teaching fractions; shopping with toddlers; catching trout; tuning a banjo
""",
    "compare": """
butter or oil; a hammock or a deckchair; blinds or curtains; opera or ballet; a scooter or skates
gold or silver; a farm or a factory; oats or muesli; badminton or squash; pencils or pens
""",
    "task": """
the vet about a limping hamster; the choirmaster about sheet music; a carpenter about a crooked shelf
a magician who amazed us; the cinema about lost gloves; a niece who learned to ride; the ferry company about a refund
a farmer whose eggs we love; the tax office about a wrong form; a referee after a hard game
our babysitter about Saturday
""",
}
"""Of the test split, written anew whenever a training had been looked at on its prompts, so that none served before."""
